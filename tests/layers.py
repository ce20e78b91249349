"""The layout of the package: which part may import which, and how large files may be."""

#: Each part imports only itself and parts before it. Parts in one tuple do not import each other.
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
    ("app",),
    ("cli",),
)
#: What a part may not import although it comes before it.
FORBIDDEN = {
    "data": ("backbones",),
    "benchmark": ("methods",),
    "adapter": ("benchmark",),
    "wrapping": ("benchmark",),
}
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 70
#: Fourteen: `field.py` makes many runs of what twelve others measure in one, and `field_report.py`
#: compares their results.
MOST_FILES_IN_BENCHMARK = 14
