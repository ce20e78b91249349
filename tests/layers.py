"""The house as it is drawn: which room may import which, and how large its parts may be."""

#: Each room imports only rooms before it and itself. Rooms of one tuple do not see each other.
LAYERS = (
    ("errors", "version"),
    ("utils",),
    ("backbones",),
    ("data",),
    ("core",),
    ("methods", "artifacts"),
    ("benchmark",),
    ("adapter",),
    ("wrapping",),
    ("train", "testing"),
    ("hosts", "demo"),
    ("cli",),
)
#: What a room may not import although it stands before it.
FORBIDDEN = {
    "data": ("backbones",),
    "benchmark": ("methods",),
    "adapter": ("benchmark",),
    "wrapping": ("benchmark",),
}
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 70
#: Fourteen: `field.py` makes many runs of what twelve others measure in one, and `field_report.py`
#: sets them side by side.
MOST_FILES_IN_BENCHMARK = 14
