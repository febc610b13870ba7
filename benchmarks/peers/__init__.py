"""What the collector is measured against."""
