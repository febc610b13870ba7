// Batches with paho.mqtt.golang and pgx's COPY. The library acknowledges a message when it has
// read it, which is before it is stored: cheaper than acknowledging after COMMIT.
package main

import (
	"context"
	"log"
	"os"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/jackc/pgtype"
	"github.com/jackc/pgx/v4"
)

const (
	batchRows = 5000
	linger    = 5 * time.Millisecond
)

type message struct {
	at       time.Time
	topic    string
	payload  []byte
	qos      int16
	retained bool
}

type batch []message

func (b batch) row(i int) ([]interface{}, error) {
	m := &b[i]
	fields := pgtype.JSONB{Bytes: m.payload, Status: pgtype.Present}
	return []interface{}{m.at, m.topic, m.payload, fields, m.qos, m.retained}, nil
}

func store(database *pgx.Conn, rows batch) {
	columns := []string{"received_at", "topic", "payload", "fields", "qos", "retained"}
	_, err := database.CopyFrom(context.Background(), pgx.Identifier{"messages"}, columns,
		pgx.CopyFromSlice(len(rows), rows.row))
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	database, err := pgx.Connect(context.Background(), os.Getenv("PEER_DATABASE"))
	if err != nil {
		log.Fatal(err)
	}
	queue := make(chan message, 2*batchRows)
	topic := os.Getenv("PEER_TOPIC")
	options := mqtt.NewClientOptions().
		AddBroker("tcp://" + os.Getenv("PEER_HOST") + ":" + os.Getenv("PEER_PORT")).
		SetClientID(os.Getenv("PEER_CLIENT")).
		SetCleanSession(false).
		SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) {
			queue <- message{time.Now(), m.Topic(), m.Payload(), int16(m.Qos()), m.Retained()}
		}).
		SetOnConnectHandler(func(client mqtt.Client) { client.Subscribe(topic, 1, nil) })
	client := mqtt.NewClient(options)
	if token := client.Connect(); token.Wait() && token.Error() != nil {
		log.Fatal(token.Error())
	}
	for first := range queue {
		rows := batch{first}
		due := time.After(linger)
	collect:
		for len(rows) < batchRows {
			select {
			case next := <-queue:
				rows = append(rows, next)
			case <-due:
				break collect
			}
		}
		store(database, rows)
	}
}
