-- update_summaries as in 0007, but when a collector's bound is earlier than processed_until, each call does not add all
-- hours in between again: after a clock had been a year ahead, the table summary_hours grew by a megabyte a second.

-- Bring the summaries up to date, or a step nearer to it. Nothing of client_id is still to be stored that
-- was received before bound. Returns how many seconds the summaries are behind the bound, and hours that
-- are to be processed again. Several collectors may call it at once.
CREATE OR REPLACE FUNCTION update_summaries(client_id text, bound timestamptz) RETURNS float8
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    from_time  timestamptz;
    until_time timestamptz;
    again      timestamptz;
BEGIN
    INSERT INTO summary_bounds AS b VALUES (update_summaries.client_id, update_summaries.bound, now())
    ON CONFLICT ON CONSTRAINT summary_bounds_pkey DO UPDATE SET bound = excluded.bound, renewed_at = excluded.renewed_at;
    IF pg_try_advisory_xact_lock(hashtext('iot.summaries')) THEN
        -- A collector that is gone is not waited for. If it comes back, it is late, see below.
        DELETE FROM summary_bounds b WHERE b.renewed_at < now() - interval '15 minutes';
        SELECT processed_until, (SELECT min(b.bound) FROM summary_bounds b) INTO from_time, until_time
        FROM summary_progress;
        IF until_time < from_time AND from_time > now() + interval '1 hour' THEN
            -- A clock was ahead, and was set back. Start again from here, not when the time of that clock comes.
            DELETE FROM readings_by_minute WHERE time > until_time;
            DELETE FROM readings_by_hour WHERE time > until_time;
            UPDATE summary_progress SET processed_until = until_time;
            INSERT INTO summary_hours VALUES (date_trunc('hour', until_time, 'UTC'));
        ELSIF until_time < from_time THEN
            -- Each hour once, however often this is called meanwhile. Only the holder of the lock deletes hours, so one that
            -- is found here is still to be processed.
            INSERT INTO summary_hours
            SELECT h FROM generate_series(date_trunc('hour', until_time, 'UTC'), from_time, '1 hour') h
            WHERE h < from_time AND NOT EXISTS (SELECT FROM summary_hours WHERE hour = h);
        ELSE
            until_time := least(until_time, from_time + interval '10 minutes');
            PERFORM add_to_summaries(from_time, until_time, false);
            UPDATE summary_progress SET processed_until = until_time;
            IF date_trunc('day', from_time, 'UTC') < date_trunc('day', until_time, 'UTC') THEN
                DELETE FROM readings_by_minute WHERE time < until_time - interval '31 days';
            END IF;
            -- Deleted before the messages are read: one that is stored later adds its hour once more.
            SELECT hour INTO again FROM summary_hours LIMIT 1;
            IF again IS NOT NULL THEN
                DELETE FROM summary_hours WHERE hour = again;
                DELETE FROM readings_by_minute WHERE time >= again AND time < again + interval '1 hour';
                DELETE FROM readings_by_hour WHERE time = again;
                PERFORM add_to_summaries(again, least(again + interval '1 hour', until_time), true);
            END IF;
        END IF;
    END IF;
    RETURN extract(epoch FROM update_summaries.bound - (SELECT processed_until FROM summary_progress))
        + 3600 * (SELECT count(DISTINCT hour) FROM summary_hours);
END
$$;
