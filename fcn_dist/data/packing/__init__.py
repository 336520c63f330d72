"""A scenes folder to shards: planned, packed one process a shard, continued, and merged from parts."""
