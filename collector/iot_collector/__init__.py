"""Stores every MQTT message in PostgreSQL and acknowledges it only after COMMIT."""

from importlib.metadata import version

__version__ = version("iot-collector")
