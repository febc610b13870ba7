"""The queries of the explorer. An index with a LIMIT, or a short time window, bounds each one.

Results are JSON made by PostgreSQL, which is sent to the browser unchanged: parsing it here would
cost the collector more than everything else. Times are Unix times in seconds. Payloads are in
base64. Messages of one read from the broker have the same time, and are in the order of their ids.
"""

# Topics in the order of the index (topic, received_at DESC). The query jumps from each topic to the
# next one, so its cost grows with the topics, not with the messages. `oldest` is the start of a
# partition. With a time within a partition, the query would walk through the messages of topics
# that have been silent since then.
TOPICS = """
WITH RECURSIVE topics AS (
    (SELECT topic, received_at FROM messages
     WHERE topic > %(after)s AND received_at >= %(oldest)s
     ORDER BY topic, received_at DESC LIMIT 1)
    UNION ALL
    SELECT next.* FROM topics t CROSS JOIN LATERAL (
        SELECT topic, received_at FROM messages
        WHERE topic > t.topic AND received_at >= %(oldest)s
        ORDER BY topic, received_at DESC LIMIT 1) next
)
SELECT max(topic), json_object_agg(topic, round(extract(epoch FROM received_at), 3))::text
FROM (SELECT * FROM topics LIMIT %(limit)s) found
"""

# Numbers of messages in a recent window: of each node that is shown, and of the busiest topics.
ACTIVITY = """
WITH recent AS MATERIALIZED (
    SELECT topic, count(*) AS n FROM messages
    WHERE received_at > now() - make_interval(secs => %(window)s)
      AND received_at <= now() + interval '1 minute'
    GROUP BY topic
), nodes AS (
    SELECT o.prefix || split_part(substr(r.topic, length(o.prefix) + 1), '/', 1) AS path,
           sum(r.n)::bigint AS n
    FROM unnest(%(open)s::text[]) o(prefix) JOIN recent r ON starts_with(r.topic, o.prefix)
    GROUP BY 1
), total AS (SELECT coalesce(sum(n), 0)::bigint AS n, count(*) AS topics FROM recent)
SELECT total.n, json_build_object(
    'window', %(window)s, 'messages', total.n, 'topics', total.topics,
    'nodes', (SELECT coalesce(json_object_agg(path, n), '{}') FROM nodes
              WHERE path = ANY(%(shown)s)),
    'busiest', (SELECT coalesce(json_agg(json_build_array(topic, n) ORDER BY n DESC, topic), '[]')
                FROM (SELECT topic, n FROM recent ORDER BY n DESC, topic LIMIT 10) top)
)::text FROM total
"""

_PREVIEW = """
    CASE WHEN m.fields IS NOT NULL AND octet_length(m.payload) <= 1000 THEN m.fields END,
    translate(encode(substr(m.payload, 1, 90), 'base64'), E'\\n', ''),
    octet_length(m.payload)
"""

# Topics with their last message: the busiest topics that match, and the topics of `others`.
FLAT_LIST = f"""
WITH recent AS MATERIALIZED (
    SELECT topic, count(*) AS n FROM messages
    WHERE received_at > now() - make_interval(secs => %(window)s)
      AND received_at <= now() + interval '1 minute'
    GROUP BY topic
), chosen AS (
    (SELECT topic FROM recent WHERE topic ~ %(pattern)s
     ORDER BY n DESC, topic LIMIT %(busiest)s)
    UNION
    SELECT unnest(%(others)s::text[])
), total AS (SELECT coalesce(sum(n), 0)::bigint AS n FROM recent)
SELECT total.n, json_build_object(
    'window', %(window)s, 'matching', %(matching)s,
    'rows', (SELECT coalesce(json_agg(json_build_array(
        c.topic, coalesce(r.n, 0), round(extract(epoch FROM m.received_at), 3), {_PREVIEW})), '[]')
    FROM chosen c LEFT JOIN recent r ON r.topic = c.topic CROSS JOIN LATERAL (
        SELECT received_at, fields, payload FROM messages
        WHERE topic = c.topic ORDER BY received_at DESC, id DESC LIMIT 1) m)
)::text FROM total
"""  # noqa: S608 - no value in it

# The last message of each topic that is shown.
LATEST = f"""
SELECT coalesce(json_agg(json_build_array(
    t.topic, round(extract(epoch FROM m.received_at), 3), {_PREVIEW})), '[]')::text
FROM unnest(%(topics)s::text[]) t(topic) CROSS JOIN LATERAL (
    SELECT received_at, fields, payload FROM messages
    WHERE topic = t.topic AND received_at > %(since)s
    ORDER BY received_at DESC, id DESC LIMIT 1) m
"""  # noqa: S608 - no value in it

_MESSAGE = """
json_build_object(
    'id', m.id::text, 'at', round(extract(epoch FROM m.received_at), 6),
    'qos', m.qos, 'retained', m.retained, 'size', octet_length(m.payload),
    'payload', translate(encode(substr(m.payload, 1, 4096), 'base64'), E'\\n', ''),
    'fields', CASE WHEN octet_length(m.payload) <= 4096 THEN m.fields END,
    'properties', CASE WHEN length(m.properties::text) <= 4096 THEN m.properties::text
                       ELSE left(m.properties::text, 4096) || ' …' END)::text
"""

# Messages of a topic, the newest first.
MESSAGES = f"""
SELECT m.id, {_MESSAGE} FROM (
    SELECT * FROM messages
    WHERE topic = %(topic)s AND received_at > %(since)s AND received_at < %(before)s
    ORDER BY received_at DESC, id DESC LIMIT %(limit)s) m
ORDER BY m.received_at DESC, m.id DESC
"""  # noqa: S608 - no value in it

# Arrays of thousands of numbers are not useful in a chart, and reading many of them takes long.
_SMALL_FIELDS = "CASE WHEN octet_length(payload) <= 16384 THEN fields END AS fields"
_NUMBERS = """
    (SELECT name, value FROM json_leaves(%(topic)s, m.fields)
     WHERE jsonb_typeof(value) = 'number' LIMIT 50)
"""
_SERIES = """
names AS (
    SELECT name FROM readings GROUP BY name ORDER BY count(*) DESC, name LIMIT %(names)s
)
SELECT json_build_object('sampled', %(step)s > 0, 'step', %(step)s,
    'messages', (SELECT count(*) FROM found),
    'names', (SELECT count(DISTINCT name) FROM readings),
    'series', coalesce((SELECT json_object_agg(name, points) FROM (
        SELECT name, json_agg(point ORDER BY at) AS points
        FROM readings JOIN names USING (name) GROUP BY name) s), '{}'))::text
FROM (SELECT) nothing
"""

# All readings of the newest messages in a time span. The number of messages is in the result: if it
# is the limit, there may be more.
READINGS = f"""
WITH found AS MATERIALIZED (
    SELECT received_at, {_SMALL_FIELDS} FROM messages
    WHERE topic = %(topic)s AND received_at > to_timestamp(%(start)s)
    ORDER BY received_at DESC LIMIT %(limit)s
), readings AS (
    SELECT f.name, extract(epoch FROM m.received_at) AS at,
           json_build_array(round(extract(epoch FROM m.received_at), 6), f.value) AS point
    FROM found m CROSS JOIN LATERAL {_NUMBERS} f
), {_SERIES}
"""  # noqa: S608 - no value in it

# A time span in steps, with the newest few messages of each step. This bounds the cost for any
# number of messages. A point is [time, mean, min, max].
SAMPLED_READINGS = f"""
WITH found AS MATERIALIZED (
    SELECT b.at, m.fields
    FROM generate_series(0, %(steps)s - 1) i
    CROSS JOIN LATERAL (SELECT (%(start)s + i * %(step)s)::float8 AS at) b
    CROSS JOIN LATERAL (
        SELECT {_SMALL_FIELDS} FROM messages
        WHERE topic = %(topic)s AND received_at >= to_timestamp(b.at)
          AND received_at < to_timestamp(b.at + %(step)s)
        ORDER BY received_at DESC LIMIT %(each)s) m
), readings AS (
    SELECT f.name, m.at, json_build_array(
        m.at + %(step)s / 2, round(avg(f.value::numeric), 9), min(f.value::numeric),
        max(f.value::numeric)) AS point
    FROM found m CROSS JOIN LATERAL {_NUMBERS} f GROUP BY f.name, m.at
), {_SERIES}
"""  # noqa: S608 - no value in it

# The newest dead letters of both tables. The second one has no index, because it is usually empty.
DEAD_LETTERS = """
SELECT coalesce(json_agg(json_build_object(
    'at', round(extract(epoch FROM received_at), 3), 'reason', left(reason, 500),
    'sqlstate', sqlstate, 'size', octet_length(payload), 'table', origin,
    'topic', translate(encode(substr(topic, 1, 512), 'base64'), E'\\n', ''),
    'payload', translate(encode(substr(payload, 1, 512), 'base64'), E'\\n', '')
    ) ORDER BY received_at DESC), '[]')::text
FROM (
    (SELECT received_at, topic, payload, reason, sqlstate, 'dead_letters' AS origin
     FROM dead_letters ORDER BY id DESC LIMIT %(limit)s)
    UNION ALL
    (SELECT received_at, topic, payload, reason, sqlstate, 'dead_letters_fallback'
     FROM dead_letters_fallback LIMIT %(limit)s)
) letters
"""
