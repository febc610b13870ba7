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

-- The numbers, booleans and texts in a document, with their paths: a.b, values[0], values[0].c. Deeper
-- than 32 levels, there are none. STRICT keeps PostgreSQL from inlining the function: its cost would be
-- estimated a thousand times too high, and a short query compiled by JIT.
CREATE FUNCTION json_leaves(root text, document jsonb) RETURNS TABLE (name text, value jsonb)
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE ROWS 4 COST 1 AS $$
WITH RECURSIVE node(name, value, depth) AS (
    SELECT root, document, 0
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
SELECT name, value FROM node WHERE jsonb_typeof(value) IN ('number', 'boolean', 'string')
$$;

-- The time that a device gave, or NULL if it is none from 2000 to 2099: an unset clock says 1970. ISO
-- 8601 without an offset is taken as UTC. It raises no error: parallel workers cannot catch one.
CREATE FUNCTION device_time(value jsonb, unit text) RETURNS timestamptz
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    content text := value #>> '{}';
    seconds numeric;
    part    text[];
    day     date;
BEGIN
    IF unit <> 'iso8601' THEN
        IF content !~ '^[0-9]{1,20}([.][0-9]{1,20})?$' THEN
            RETURN NULL;
        END IF;
        seconds := content::numeric / CASE unit WHEN 's' THEN 1 WHEN 'ms' THEN 1000 ELSE 1000000 END;
    ELSE
        part := regexp_match(content,
            '^(20[0-9]{2})-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt ]([01][0-9]|2[0-3]):([0-5][0-9])'
            '(?::([0-5][0-9]|60)(?:[.,]([0-9]{1,20}))?)?(?:([Zz])|([+-])([01][0-9])(?::?([0-5][0-9]))?)?$');
        IF part IS NULL THEN
            RETURN NULL;
        END IF;
        day := make_date(part[1]::integer, part[2]::integer, 1) + (part[3]::integer - 1);
        IF extract(month FROM day) <> part[2]::integer THEN  -- 31 February
            RETURN NULL;
        END IF;
        seconds := (day - date '1970-01-01') * 86400 + part[4]::integer * 3600 + part[5]::integer * 60
            + (coalesce(part[6], '0') || '.' || coalesce(part[7], '0'))::numeric
            - (coalesce(part[9], '+') || '1')::integer
              * (coalesce(part[10], '0')::integer * 3600 + coalesce(part[11], '0')::integer * 60);
    END IF;
    IF seconds < 946684800 OR seconds >= 4102444800 THEN
        RETURN NULL;
    END IF;
    RETURN timestamptz '1970-01-01 00:00+00' + make_interval(secs => seconds::float8);
END
$$;

-- A row for each number, boolean and text in fields, for people and dashboards. value is that of a
-- number, and 1 or 0 for a boolean; text is that of all three. levels has the named levels of the topic,
-- and device_time the time that the device gave: both are computed only where a query asks for them.
--
-- A document that is no object is put into one, under the last level of its topic if it is a single
-- value. Most values are not nested, which is why the first level is read without json_leaves.
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
    ) AS device_time
FROM messages m
CROSS JOIN LATERAL jsonb_each(
    CASE jsonb_typeof(m.fields)
        WHEN 'object' THEN m.fields
        WHEN 'array' THEN jsonb_build_object('', m.fields)
        ELSE jsonb_build_object(split_part(m.topic, '/', -1), m.fields)
    END
) top
CROSS JOIN LATERAL (
    SELECT top.key AS name, top.value
    WHERE jsonb_typeof(top.value) IN ('number', 'boolean', 'string')
    UNION ALL
    SELECT nested.name, nested.value FROM json_leaves(top.key, top.value) nested
    WHERE jsonb_typeof(top.value) IN ('object', 'array')
) leaf;

COMMENT ON VIEW readings IS 'Each number, boolean and text that devices sent, see docs/payloads.md';
