"""The collector with paho's own reader: what reading in bulk is worth."""

from iot_collector import connection, reader
from iot_collector.cli import main

# The name that connection imported from reader, in the place where it is looked up.
vars(connection)["make_client"] = reader.StockClient

if __name__ == "__main__":
    main()
