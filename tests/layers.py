"""The house as it is drawn: which room may import which, and how large a file may be."""

#: Each room imports only rooms before it and itself. Rooms of one tuple do not see each other.
LAYERS = (
    ("errors", "version"),
    ("utils",),
    ("backbones", "data"),
    ("core",),
    ("methods", "artifacts"),
    ("adapter",),
    ("wrapping",),
    ("testing", "train"),
    ("benchmark",),
    ("hosts", "demo"),
    ("cli",),
)
#: What a room may not import although it stands before it.
FORBIDDEN = {
    "benchmark": ("methods", "adapter", "wrapping", "train", "testing", "core"),
    "artifacts": ("core",),
}
