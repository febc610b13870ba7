// A row a message with mqtt.js and node-postgres, as most examples have it: the library
// acknowledges a message when it has been emitted, which is before it is stored.
import mqtt from "mqtt";
import pg from "pg";

const { PEER_HOST, PEER_PORT, PEER_CLIENT, PEER_TOPIC, PEER_DATABASE } = process.env;
const pool = new pg.Pool({ connectionString: PEER_DATABASE });
const client = mqtt.connect(`mqtt://${PEER_HOST}:${PEER_PORT}`, {
  clientId: PEER_CLIENT,
  clean: false,
});

client.on("connect", () => client.subscribe(PEER_TOPIC, { qos: 1 }));
client.on("message", async (topic, payload, packet) => {
  try {
    await pool.query(
      `INSERT INTO messages (received_at, topic, payload, fields, qos, retained)
       VALUES (now(), $1, $2, $3, $4, $5)`,
      [topic, payload, payload.toString(), packet.qos, packet.retain],
    );
  } catch (error) {
    console.error("not stored", error.message);
  }
});
process.on("SIGTERM", () => process.exit(0));
