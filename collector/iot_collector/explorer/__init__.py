"""The live explorer: a page that shows what devices publish, and the state of the pipeline.

What it shows of messages comes from PostgreSQL, through one read-only connection, and only while
somebody looks at the page. So storing messages costs the same with and without it, the page of
each collector shows the messages of all, and history and live values have one source.
"""

from .web import THREADS, Explorer

__all__ = ["THREADS", "Explorer"]
