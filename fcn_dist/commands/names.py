"""The commands, and what each is for."""

COMMANDS = {
    "download": "fetch the benchmark's scenes",
    "create": "pack a folder of scenes into shards",
    "merge": "join the parts of a set that several runs have packed",
    "verify": "check a shard set against its index",
    "describe": "print what a shard set holds",
    "synthesize": "render synthetic scenes",
    "plan": "reckon what training holds and which micro-batch fits",
    "train": "train on one device, all devices of this host, or several hosts",
    "evaluate": "score a run or a model file on a shard set",
    "convert": "turn a run's checkpoint into one model file",
    "predict": "label images with a model file",
    "serve": "label images on a local page, or for scripts over HTTP",
    "report": "write a page about a run, or several side by side",
    "completion": "print a script that completes commands and options in a shell",
}

# The script launch/train.py is always a rank; the command starts as many as are asked for.
FRONTS = {"train": "supervise"}
