"""Measures the collector side by side with others; see README.md."""
