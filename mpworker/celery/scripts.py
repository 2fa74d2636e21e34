"""What Redis itself decides: the scripts that store results, and the rules by which what is there stays.

Owns the scripts' text. Never runs one.
"""

from __future__ import annotations

from redis import exceptions as redis_errors

#: A word on progress that is newer than ours by more than this (seconds) is due to a clock, and replaced.
SKEW = 10.0


def storing_script(rule: str, functions: str = "") -> str:
    """The script that stores results, publishes them, and notes in the history what has ended.

    KEYS: of the tasks; behind them that of the history, if there is one. ARGV: how many the history holds; then for
    each task payload, milliseconds to live (0 for ever), two for the rule, and a summary for the history, or nothing.
    Returns for each 1: stored; 0: a SUCCESS was there; -1: what is there is no JSON, nothing done; -2: what is there is
    no text, nothing done; 3: stored, but the history does not take it; or what the rule returns.

    Args:
        rule: returns where ``meta``, whose ``status`` is there, is not to be replaced; ``a`` and ``b`` are its two
            arguments. No SUCCESS comes to it.
        functions: that the rule calls.
    """
    return f"""
{functions}
local function store(key, payload, live, a, b, summary, history)
    local old = redis.pcall('GET', key)
    if type(old) == 'table' then
        return string.find(old['err'], 'WRONGTYPE') and -2 or old
    end
    if old and old ~= payload then
        local readable, meta = pcall(cjson.decode, old)
        if not readable or type(meta) ~= 'table' then
            return -1
        end
        local status = meta['status']
        if status == 'SUCCESS' then
            return 0
        end
        {rule}
    end
    if tonumber(live) > 0 then
        redis.call('SET', key, payload, 'PX', live)
    else
        redis.call('SET', key, payload)
    end
    redis.call('PUBLISH', key, payload)
    if summary ~= '' and old ~= payload then
        local noted = redis.pcall('XADD', history, 'MAXLEN', '~', ARGV[1], '*', 'r', summary)
        if type(noted) == 'table' then
            return 3
        end
    end
    return 1
end
local replies, tasks = {{}}, (#ARGV - 1) / 5
for i = 1, tasks do
    local at = 5 * i - 3
    local reply = store(KEYS[i], ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], KEYS[tasks + 1])
    if type(reply) == 'table' then
        return reply
    end
    replies[i] = reply
end
return replies
"""


#: Replies of that script.
WRONG_TYPE, HISTORY_REFUSED = -2, 3

#: Arguments: with the state PROGRESS its time, and SKEW.
STORE = storing_script("""
        if a ~= '' then
            local newer = (tonumber(meta['told']) or 0) - tonumber(a)
            if status == 'FAILURE' or status == 'REVOKED' or (newer > 0 and newer < tonumber(b)) then
                return 0
            end
        end
""")

_SECONDS = """
local function seconds(text)
    local y, m, d, h, min, s, sign, oh, om =
        string.match(text, '^(%d+)-(%d+)-(%d+)[T ](%d+):(%d+):([%d.]+)([+-])(%d+):(%d+)$')
    if not y then
        return nil
    end
    y, m = tonumber(y), tonumber(m)
    if m < 3 then
        y, m = y - 1, m + 12
    end
    local days = 365 * y + math.floor(y / 4) - math.floor(y / 100) + math.floor(y / 400)
        + math.floor((153 * (m - 3) + 2) / 5) + d
    local offset = (oh * 60 + om) * (sign == '-' and -60 or 60)
    return ((days * 24 + h) * 60 + min) * 60 + s - offset
end
"""
#: Arguments: the record's time; its state, or LATE for a start of long ago. Returns also 2: something newer was there.
_RULE = """
        if b ~= 'SUCCESS' then
            local done, told, time = meta['date_done'], status == 'PROGRESS' and tonumber(meta['told']), seconds(a)
            if status == 'FAILURE' or status == 'REVOKED' then
                local ended = type(done) == 'string' and seconds(done)
                -- A retry that was said only after its task had failed is none that came after that.
                if not ended or not time or ended + (b == 'RETRY' and 1 or 0) >= time then
                    return 2
                end
            end
            if told and time and told + seconds('1970-01-01T00:00:00+00:00') >= time then
                return 2
            end
            if b == 'LATE' and (status == 'STARTED' or status == 'RETRY' or status == 'PROGRESS') then
                return 2
            end
        end
"""
DELIVER = storing_script(_RULE, _SECONDS)


def refuses_scripts(exc: redis_errors.ResponseError) -> bool:
    return isinstance(exc, redis_errors.NoPermissionError) or "unknown command" in str(exc).lower()
