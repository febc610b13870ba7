-- From here on, fields may also be a nested object, an array, a number, a text or a boolean, and
-- readings shows what is in them at any depth.
COMMENT ON COLUMN messages.fields IS
    'The payload as JSON, where it is JSON or can be read as it, see docs/payloads.md';

-- IOT_TOPIC_TEMPLATES and IOT_DEVICE_TIME_KEYS, written by a collector when it starts.
CREATE TABLE topic_templates (
    position integer PRIMARY KEY,
    template text    NOT NULL,
    pattern  text    NOT NULL,  -- the template as a regular expression, with a group for each name
    names    text[]  NOT NULL
);
CREATE TABLE device_time_keys (
    position integer PRIMARY KEY,
    path     text[]  NOT NULL,
    unit     text    NOT NULL   -- iso8601, s, ms or us
);

-- The numbers, booleans and texts in a document, by path: a.b, values[0], values[0].c. A document that is
-- one itself has the last level of its topic as its name. What is nested deeper than 32 levels is left
-- out. In PL/pgSQL, because as a part of the view it takes longer: PostgreSQL then expects a hundred rows
-- a message, and compiles or caches what does not pay.
CREATE FUNCTION json_leaves(topic text, document jsonb) RETURNS TABLE (name text, value jsonb)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE ROWS 8 COST 10 AS $$
#variable_conflict use_column
DECLARE
    kind text := jsonb_typeof(document);
BEGIN
    IF kind IN ('number', 'boolean', 'string') THEN
        name := split_part(topic, '/', -1);
        value := document;
        RETURN NEXT;
        RETURN;
    ELSIF kind = 'object' THEN
        -- Most have only this level, which is read without the recursion below.
        RETURN QUERY SELECT key, value FROM jsonb_each(document)
            WHERE jsonb_typeof(value) IN ('number', 'boolean', 'string');
        IF NOT document @? 'strict $.* ? (@.type() == "object" || @.type() == "array")' THEN
            RETURN;
        END IF;
    END IF;
    RETURN QUERY
    WITH RECURSIVE node(name, value, depth) AS (
        SELECT '', document, 0
        UNION ALL
        SELECT child.name, child.value, parent.depth + 1
        FROM node parent CROSS JOIN LATERAL (
            SELECT concat_ws('.', nullif(parent.name, ''), key) AS name, value
            FROM jsonb_each(CASE jsonb_typeof(parent.value) WHEN 'object' THEN parent.value END)
            UNION ALL
            SELECT parent.name || '[' || number - 1 || ']', value
            FROM jsonb_array_elements(CASE jsonb_typeof(parent.value) WHEN 'array' THEN parent.value END)
                WITH ORDINALITY element(value, number)
        ) child
        WHERE parent.depth < 32 AND jsonb_typeof(parent.value) IN ('object', 'array')
    )
    SELECT name, value FROM node
    WHERE jsonb_typeof(value) IN ('number', 'boolean', 'string') AND (depth > 1 OR kind = 'array');
END
$$;

-- The time that a device gave, or NULL if it is none from 2000 to 2099: an unset clock says 1970. ISO
-- 8601 without an offset is taken as UTC. It raises no error, which parallel workers could not catch:
-- what is cast has been checked. The regular expressions have no groups, which would make them slow.
CREATE FUNCTION device_time(value jsonb, unit text) RETURNS timestamptz
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE AS $$
DECLARE
    content text := value #>> '{}';
    seconds numeric;
BEGIN
    IF unit <> 'iso8601' THEN
        IF content !~ '^[0-9]{1,20}(?:[.][0-9]{1,20})?$' THEN
            RETURN NULL;
        END IF;
        seconds := content::numeric / CASE unit WHEN 's' THEN 1 WHEN 'ms' THEN 1000 ELSE 1000000 END;
        IF seconds < 946684800 OR seconds >= 4102444800 THEN
            RETURN NULL;
        END IF;
        RETURN timestamptz '1970-01-01 00:00+00' + make_interval(secs => seconds::float8);
    END IF;
    IF content !~ ('^20[0-9][0-9]-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])[Tt ](?:[01][0-9]|2[0-3]):[0-5][0-9]'
                   '(?::[0-5][0-9](?:[.,][0-9]{1,20})?)?(?:[Zz]|[+-](?:0[0-9]|1[0-5])(?::?[0-5][0-9])?)?$') THEN
        RETURN NULL;
    END IF;
    IF substr(content, 9, 2)::integer > 28 AND extract(month FROM make_date(  -- 30 February
            substr(content, 1, 4)::integer, substr(content, 6, 2)::integer, 1)
            + substr(content, 9, 2)::integer - 1) <> substr(content, 6, 2)::integer THEN
        RETURN NULL;
    END IF;
    IF substr(content, 17) !~ '[Zz+-]' THEN
        content := content || 'Z';
    END IF;
    RETURN replace(content, ',', '.')::timestamptz;
END
$$;

-- A row for each number, boolean and text in fields, for people and dashboards. value is that of a
-- number, and 1 or 0 for a boolean; text is that of all three. levels has the named levels of the topic,
-- and device_time the time that the device gave: both are computed only where a query asks for them.
CREATE OR REPLACE VIEW readings AS
SELECT
    m.received_at AS time,
    m.topic,
    leaf.name,
    CASE jsonb_typeof(leaf.value)
        WHEN 'number' THEN leaf.value::numeric
        WHEN 'boolean' THEN leaf.value::boolean::integer
    END AS value,
    leaf.value #>> '{}' AS text,
    (
        SELECT jsonb_object(t.names, regexp_match(m.topic, t.pattern))
        FROM topic_templates t WHERE m.topic ~ t.pattern ORDER BY t.position LIMIT 1
    ) AS levels,
    (
        SELECT found.time FROM device_time_keys k
        CROSS JOIN LATERAL (SELECT device_time(m.fields #> k.path, k.unit) AS time) found
        WHERE found.time IS NOT NULL ORDER BY k.position LIMIT 1
    ) AS device_time,
    m.id
FROM messages m CROSS JOIN LATERAL json_leaves(m.topic, m.fields) leaf;

COMMENT ON VIEW readings IS 'Each number, boolean and text that devices sent, see docs/payloads.md';
