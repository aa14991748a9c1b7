"""From data files to batches: formats, streaming, tokens and labels, packing, load balance."""

from ernie45.training.data.encode import Encoder, Example, Pair
from ernie45.training.data.files import DataFiles, Source
from ernie45.training.data.formats import parse, read_line
from ernie45.training.data.packing import Batch, pack
from ernie45.training.data.records import Conversation, Preference, Record, Text
from ernie45.training.data.stream import DataStream

__all__ = [
    "Batch",
    "Conversation",
    "DataFiles",
    "DataStream",
    "Encoder",
    "Example",
    "Pair",
    "Preference",
    "Record",
    "Source",
    "Text",
    "pack",
    "parse",
    "read_line",
]
