"""The commands: parse, call the library, report. Scripts in launch/ and shards/ call the same functions."""
