"""The simplest program: for each message INSERT, COMMIT and PUBACK."""

import os
import signal
import sys

import psycopg2
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

_INSERT = (
    "INSERT INTO messages (received_at, topic, payload, fields, qos, retained)"
    " VALUES (now(), %s, %s, %s, %s, %s)"
)


def main() -> None:
    """Store messages until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    database = psycopg2.connect(os.environ["PEER_DATABASE"])
    cursor = database.cursor()

    def on_message(client: Client, _data: object, message: MQTTMessage) -> None:
        text = message.payload.decode()
        cursor.execute(_INSERT, (message.topic, message.payload, text, message.qos, message.retain))
        database.commit()
        client.ack(message.mid, message.qos)

    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=os.environ["PEER_CLIENT"],
        clean_session=False,
        manual_ack=True,
    )
    client.on_connect = lambda c, *_: c.subscribe(os.environ["PEER_TOPIC"], 1)
    client.on_message = on_message
    client.connect(os.environ["PEER_HOST"], int(os.environ["PEER_PORT"]))
    client.loop_forever()


if __name__ == "__main__":
    main()
