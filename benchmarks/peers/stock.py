"""The collector with paho's own reader, to show the effect of reading in bulk."""

from iot_collector import client, connection
from iot_collector.cli import main

# connection.py imported this name from client.py.
vars(connection)["make_client"] = client.StockClient

if __name__ == "__main__":
    main()
