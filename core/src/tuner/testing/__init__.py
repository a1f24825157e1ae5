"""For plugin authors: small real objects to test against."""
