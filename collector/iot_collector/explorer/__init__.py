"""The live explorer: a page that shows what devices publish, and the state of the pipeline.

It reads messages from PostgreSQL, through one read-only connection, and only while somebody looks
at the page. So it does not slow down storing, the page of each collector shows the messages of all
collectors, and history and live values have one source.
"""

from .web import THREADS, Explorer

__all__ = ["THREADS", "Explorer"]
