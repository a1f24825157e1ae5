"""tuner: fine-tunes large video and audio models; families and techniques arrive as plugins."""

__version__ = "0.1.0"

HOOKSPEC_VERSION = 1
"""One integer for the whole plugin interface; a plugin states the one it was written for."""
