"""Registers what this distribution offers."""
