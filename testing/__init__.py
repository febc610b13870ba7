"""Services that tests and benchmarks start: one module, one service.

Everything listens on 127.0.0.1, on a free port unless it is given one, with its files in a folder
of its own. What is started here is ended here, by its process id.
"""
