"""The programs that the collector is compared with."""
