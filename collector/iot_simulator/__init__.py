"""Devices that publish to the broker of the collector's settings, and count what it takes."""
