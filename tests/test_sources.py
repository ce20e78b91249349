"""Sources of images: the same pictures give the same tensors, in the same order, or one error."""

import gc
import io
import os
import pickle
import shutil
import tempfile
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageDraw
from timm.data import create_dataset
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ttt_plugins.data import parquet
from ttt_plugins.data.decode import PictureError
from ttt_plugins.data.images import LabelledImages
from ttt_plugins.data.loading import ImageLoader
from ttt_plugins.data.opening import open_images
from ttt_plugins.data.source import ImageSource, Sample
from ttt_plugins.data.transforms import evaluation_transform
from ttt_plugins.errors import DataError, InputError

CLASSES = ("ant", "bee", "cat")
SIZE = (24, 20)  # width, height


def picture(number, size=SIZE):
    drawn = Image.new("RGB", size, (11 * number % 256, 40, 200 - number))
    ImageDraw.Draw(drawn).ellipse((2, 3, 9 + number, 15), fill=(250, 17 * number % 256, 3))
    return drawn


def png(drawn):
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(i) for i in range(9)]
LABELS = [i // 3 for i in range(9)]
PIXELS = np.stack([np.asarray(drawn) for drawn in PICTURES])
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def write_folder(root, pictures=PICTURES, labels=LABELS):
    for i, (drawn, label) in enumerate(zip(pictures, labels, strict=True)):
        folder = root / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        drawn.save(folder / f"{i:02d}.png")
    return root


def write_parquet(path, rows=range(9), group=4, columns=("image", "label"), names=CLASSES, **more):
    images = [{"bytes": png(PICTURES[i]), "path": f"{i:02d}.png"} for i in rows]
    table = pa.table({columns[0]: images, columns[1]: [LABELS[i] for i in rows], **more})
    if names:
        features = f'{{"info": {{"features": {{"{columns[1]}": {{"names": {list(names)}}}}}}}}}'
        written = {"huggingface": features.replace("'", '"')}
        table = table.replace_schema_metadata(written)
    pq.write_table(table, path, row_group_size=group)
    return path


class Pairs(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], LABELS[row]


def made(kind, folder):
    if kind == "class folders":
        return write_folder(folder)
    if kind == "parquet file":
        return write_parquet(folder / "one.parquet")
    if kind == "parquet shards":
        for shard in range(3):
            write_parquet(
                folder / f"train-{shard:05d}-of-00003.parquet", range(3 * shard, 3 * shard + 3)
            )
        return folder
    if kind in ("npz", "compressed npz"):
        save = np.savez if kind == "npz" else np.savez_compressed
        save(folder / "some.npz", images=PIXELS, labels=LABELS)
        return folder / "some.npz"
    if kind == "dataset of pictures":
        return Pairs(PICTURES)
    if kind == "torchvision folder":
        return torchvision.datasets.ImageFolder(write_folder(folder))
    if kind == "timm folder":
        return create_dataset("", root=write_folder(folder))
    if kind == "rows of columns":
        return [
            {"image": {"bytes": png(p), "path": None}, "label": n}
            for p, n in zip(PICTURES, LABELS, strict=True)
        ]
    return {
        "labelled images": LabelledImages(EXPECTED, torch.tensor(LABELS)),
        "tensor and labels": (EXPECTED, torch.tensor(LABELS)),
        "dataset of arrays": Pairs(list(PIXELS)),
        "tensor dataset": TensorDataset(EXPECTED, torch.tensor(LABELS)),
        "loader": DataLoader(TensorDataset(EXPECTED, torch.tensor(LABELS)), batch_size=4),
        "generator": ((drawn, label) for drawn, label in zip(PICTURES, LABELS, strict=True)),
    }[kind]


ORDERED = (
    "class folders",
    "parquet file",
    "parquet shards",
    "npz",
    "compressed npz",
    "dataset of pictures",
    "torchvision folder",
    "timm folder",
    "rows of columns",
    "labelled images",
    "tensor and labels",
    "dataset of arrays",
    "tensor dataset",
)
KINDS = (*ORDERED, "loader", "generator")
SHRINK = evaluation_transform(None, 16)


def gathered(loader):
    batches = list(loader)
    labels = [b.labels for b in batches]
    return (
        torch.cat([b.images for b in batches]),
        None if None in labels else torch.cat(labels),
        [name for b in batches for name in b.names],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_yields_the_same_tensors(kind, tmp_path):
    images, labels, names = gathered(ImageLoader(open_images(made(kind, tmp_path)), workers=0))
    assert torch.equal(images, EXPECTED)
    assert labels.tolist() == LABELS
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_is_resized_alike(kind, tmp_path):
    source = open_images(made(kind, tmp_path))
    images, _, _ = gathered(ImageLoader(source, workers=0, transform=SHRINK, batch_size=4))
    assert torch.equal(images, torch.stack([SHRINK(drawn) for drawn in PICTURES]))


def test_images_without_labels(tmp_path):
    for i, drawn in enumerate(PICTURES):
        drawn.save(tmp_path / f"{i}.png")
    np.save(tmp_path / "some.npy", PIXELS)
    for given in (tmp_path, tmp_path / "some.npy", PIXELS, EXPECTED, DataLoader(EXPECTED)):
        source = open_images(given)
        images, labels, _ = gathered(ImageLoader(source, workers=0))
        assert torch.equal(images, EXPECTED)
        assert labels is None
        assert not source.labelled


def test_class_names_come_with_folders_parquet_and_data_sets(tmp_path):
    for kind in ("class folders", "parquet file", "torchvision folder"):
        place = tmp_path / kind
        place.mkdir()
        assert open_images(made(kind, place)).classes == CLASSES
    assert open_images(EXPECTED).classes is None


def test_floats_are_taken_as_they_are():
    floats = EXPECTED / 255
    for given in (floats, TensorDataset(floats), DataLoader(floats, batch_size=2)):
        images, _, _ = gathered(ImageLoader(open_images(given), transform=SHRINK, workers=0))
        assert torch.equal(images, floats)


def test_labels_follow_the_sorted_folders_as_torchvision_has_them(tmp_path):
    root = write_folder(tmp_path, labels=LABELS[::-1])
    (root / "bee" / "deeper").mkdir()
    picture(3).save(root / "bee" / "deeper" / "more.JPG")
    (root / "bee" / "notes.txt").write_text("no picture")
    theirs = torchvision.datasets.ImageFolder(root)
    (root / ".cache").mkdir()
    found = open_images(root)
    # The same files of the same labels; within a class folder ours puts its files first.
    ours = {(found.read(i).name, found.read(i).label) for i in range(len(found))}
    assert ours == {(os.path.relpath(path, root), label) for path, label in theirs.samples}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["class folders", "parquet file", "npz"])
def test_the_order_does_not_depend_on_the_workers(kind, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", 300)
    source = open_images(made(kind, tmp_path))
    expected = gathered(ImageLoader(source, workers=0, seed=seed, batch_size=2))
    if seed is not None:
        assert not torch.equal(expected[0], EXPECTED)
        assert sorted(expected[1].tolist()) == LABELS
        assert expected[2] != gathered(ImageLoader(source, workers=0, seed=4))[2]
    for workers in (1, 2):
        found = gathered(ImageLoader(source, workers=workers, seed=seed, batch_size=2))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2] == expected[2]


@pytest.mark.parametrize("kind", ["class folders", "loader"])
def test_reading_resumes_where_a_batch_ended(kind, tmp_path):
    source = open_images(made(kind, tmp_path))
    seed = 5 if isinstance(source, ImageSource) else None
    whole = list(ImageLoader(source, workers=0, seed=seed, batch_size=2))
    assert [b.end for b in whole] == [2, 4, 6, 8, 9]
    for broken in (0, 2, 4):
        start = whole[broken].end
        rest = list(ImageLoader(source, workers=0, seed=seed, batch_size=2, start=start))
        assert [b.names for b in rest] == [b.names for b in whole[broken + 1 :]]
        assert [b.end for b in rest] == [b.end for b in whole[broken + 1 :]]
    assert sum(len(b.names) for b in ImageLoader(source, workers=0, limit=5, start=2)) == 3


def test_a_stream_cannot_be_shuffled():
    with pytest.raises(InputError, match="in one order only"):
        ImageLoader(open_images(DataLoader(EXPECTED)), seed=0)


# -- what parquet files hold ------------------------------------------------------------------


def test_columns_are_found_or_given(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", columns=("img", "fine_label"))
    assert gathered(ImageLoader(open_images(file), workers=0))[1].tolist() == LABELS
    other = [{"bytes": png(picture(0)), "path": "x"}] * 9
    file = write_parquet(
        tmp_path / "b.parquet", columns=("left", "kind"), right=other, note=["a"] * 9
    )
    with pytest.raises(DataError, match=r"which column holds the pictures; .*'left', 'right'"):
        open_images(file)
    source = open_images(file, image_column="left", label_column="kind")
    assert torch.equal(gathered(ImageLoader(source, workers=0))[0], EXPECTED)
    assert not open_images(file, image_column="right").labelled
    with pytest.raises(DataError, match="no column 'note' of integers"):
        open_images(file, image_column="left", label_column="note")


def test_plain_bytes_are_pictures_too(tmp_path):
    pq.write_table(pa.table({"jpg": [png(p) for p in PICTURES]}), tmp_path / "a.parquet")
    source = open_images(tmp_path / "a.parquet")
    images, labels, names = gathered(ImageLoader(source, workers=0))
    assert torch.equal(images, EXPECTED)
    assert labels is None
    assert names[2] == "row 2"


@pytest.mark.parametrize("block_bytes", [1, 200, 500, 10**9])
@pytest.mark.parametrize("group", [1, 2, 5, 9])
def test_rows_are_found_whatever_the_blocks(block_bytes, group, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(parquet, "OPEN_BLOCKS", 2)
    source = open_images(write_parquet(tmp_path / "a.parquet", group=group))
    assert [row for block in source.blocks() for row in block] == list(range(9))
    for row in (3, 8, 0, 1, 2, 7, 5, 6, 4, 8, 0):
        assert source.read(row).image == PICTURES[row]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(4).image == PICTURES[4]


@pytest.mark.parametrize("what", ["missing", "damaged", "columns", "empty"])
def test_files_that_hold_no_images_are_refused_with_their_path(what, tmp_path):
    file = tmp_path / "a.parquet"
    if what == "damaged":
        file.write_bytes(write_parquet(tmp_path / "b.parquet").read_bytes()[:-40])
    if what == "columns":
        pq.write_table(pa.table({"text": ["a"]}), file)
    if what == "empty":
        write_parquet(file, [])
    with pytest.raises(DataError, match=r"a\.parquet"):
        open_images(file)
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"x\.npz: not a readable npz file"):
        open_images(tmp_path / "x.npz")


def test_arrays_that_are_no_images_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", severity_1=PIXELS, severity_2=PIXELS)
    with pytest.raises(DataError, match=r"no array has a usual name .*severity_1"):
        open_images(tmp_path / "two.npz")
    assert len(open_images(tmp_path / "two.npz", image_column="severity_2")) == 9
    for bad in (PIXELS.astype("int32"), PIXELS[0, 0], PIXELS[:0]):
        with pytest.raises(DataError, match="images must be"):
            open_images(bad)
    with pytest.raises(DataError, match="9 images need as many integer labels"):
        open_images((PIXELS, LABELS[:3]))
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy: not a readable npy"):
        open_images(tmp_path / "objects.npy")


def test_nothing_else_is_a_source(tmp_path):
    (tmp_path / "a.txt").write_text("no")
    with pytest.raises(DataError, match=r"a\.txt: not a folder"):
        open_images(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="got int"):
        open_images(3)
    with pytest.raises(InputError, match="must yield images"):
        open_images([{"text": "a"}])
    with pytest.raises(InputError, match="the label of item 0"):
        open_images([(PICTURES[0], "cat")])


# -- bad pictures ------------------------------------------------------------------------------


def save_odd(kind, file):
    """A picture that is not 8-bit RGB; none if timm would make nothing of it."""
    drawn = PICTURES[4]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to show
    options = {"exif": exif} if kind == "EXIF-rotated" else {}
    mode = {"greyscale": "L", "palette": "P", "alpha": "RGBA", "CMYK": "CMYK", "1 bit": "1"}
    drawn = drawn.convert(mode.get(kind, "RGB"))
    if kind == "alpha":
        drawn.putalpha(77)
    drawn.save(file.with_suffix(".jpg" if kind in ("CMYK", "EXIF-rotated") else ".png"), **options)


@pytest.mark.parametrize("kind", ["greyscale", "palette", "alpha", "CMYK", "EXIF-rotated", "1 bit"])
def test_odd_pictures_are_read_as_timm_reads_them(kind, tmp_path):
    (tmp_path / "one").mkdir()
    save_odd(kind, tmp_path / "one" / "odd")
    source = open_images(tmp_path)
    theirs, _ = create_dataset("", root=tmp_path, transform=SHRINK)[0]
    found, _, _ = gathered(ImageLoader(source, workers=0, transform=SHRINK))
    assert torch.equal(found[0], theirs)
    if kind == "EXIF-rotated":
        assert source.read(0).image.size == SIZE


def spoil(kind, file):
    if kind == "cut short":
        PICTURES[0].resize((200, 200)).save(file, "JPEG")
        file.write_bytes(file.read_bytes()[:700])
    elif kind == "damaged":
        content = bytearray(png(PICTURES[0]))
        content[60:90] = bytes(30)
        file.write_bytes(content)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "no picture":
        file.write_text("<html>not found</html>")
    elif kind == "16 bits":
        Image.fromarray(np.full((20, 24), 40_000, np.uint16)).save(file, "PNG")
    else:
        file.unlink()


BAD = ("cut short", "damaged", "empty", "no picture", "16 bits", "gone")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_one_line_with_its_path(kind, workers, tmp_path):
    root = write_folder(tmp_path)
    source = open_images(root)
    spoil(kind, root / "bee" / "04.png")
    with pytest.raises(PictureError) as caught:
        list(ImageLoader(source, workers=workers, batch_size=2))
    assert str(root / "bee" / "04.png") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_skipped_and_counted(workers, tmp_path):
    root = write_folder(tmp_path)
    for row, kind in enumerate(BAD[:-1]):
        spoil(kind, root / CLASSES[LABELS[row]] / f"{row:02d}.png")
    loader = ImageLoader(open_images(root), workers=workers, batch_size=2, skip_damaged=True)
    images, labels, names = gathered(loader)
    assert torch.equal(images, EXPECTED[5:])
    assert labels.tolist() == LABELS[5:]
    assert names[0] == os.path.join("bee", "05.png")
    assert len(loader.skipped) == 5
    assert str(root / "ant" / "00.png") in loader.skipped[0]


def test_a_bad_picture_in_a_parquet_file_is_named_by_its_row(tmp_path):
    rows = [{"bytes": png(PICTURES[0]), "path": "a.png"}, {"bytes": b"x", "path": "b.png"}, None]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    source = open_images(tmp_path / "a.parquet")
    with pytest.raises(PictureError, match=r"a\.parquet, row 1 \(b\.png\): not a picture"):
        list(ImageLoader(source, workers=0))
    loader = ImageLoader(source, workers=0, skip_damaged=True)
    assert [len(b.images) for b in loader] == [1]
    assert len(loader.skipped) == 2


def test_a_folder_without_pictures_and_a_class_without_any(tmp_path):
    with pytest.raises(DataError, match=r"no pictures; looked for \.jpg"):
        open_images(tmp_path)
    root = write_folder(tmp_path)
    (root / "bat").mkdir()
    with pytest.raises(DataError, match=r"bat: a class folder without pictures"):
        open_images(root)
    (root / "bat").rmdir()
    PICTURES[0].save(root / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png: a picture beside the class folders"):
        open_images(root)


def test_pictures_of_different_sizes_need_a_transform(tmp_path):
    root = write_folder(tmp_path)
    picture(4, (30, 20)).save(root / "bee" / "04.png")
    source = open_images(root)
    with pytest.raises(DataError, match=r"00\.png is .*\(3, 20, 24\).* bee/04\.png is .*20, 30"):
        list(ImageLoader(source, workers=0))
    assert gathered(ImageLoader(source, workers=0, transform=SHRINK))[0].shape == (9, 3, 16, 16)


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"start": -1}, {"limit": 0}, {"workers": -1}, {"batch_size": True}]
)
def test_arguments_out_of_range(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be an integer of at least"):
        ImageLoader(open_images(EXPECTED), **bad)


# -- never all at once -------------------------------------------------------------------------


class Counting(ImageSource):
    """Ten gigabytes of pictures, drawn when they are read; counts those that are alive."""

    location = "a counting source"

    def __init__(self):
        self.read_rows = 0

    def __len__(self):
        return 70_000

    def read(self, row):
        self.read_rows += 1
        return Sample(Image.new("RGB", (224, 224), (row % 256, 0, 0)), None, str(row))


def test_nothing_is_read_before_it_is_needed():
    source = Counting()
    batches = iter(ImageLoader(source, workers=0, batch_size=8, seed=1))
    assert source.read_rows == 0
    tracemalloc.start()
    for shown in range(1, 6):
        next(batches)
        assert source.read_rows == 8 * shown
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


class CountedStream:
    def __init__(self):
        self.given = 0

    def __iter__(self):
        for _ in range(10**9):
            self.given += 1
            yield torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


def test_a_stream_is_read_no_further_than_needed():
    stream = CountedStream()
    batches = iter(ImageLoader(open_images(stream), batch_size=4))
    for _ in range(3):
        next(batches)
    assert stream.given == 6


def test_blocks_of_a_parquet_file_are_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(parquet, "OPEN_BLOCKS", 2)
    source = open_images(write_parquet(tmp_path / "a.parquet", group=9))
    for row in range(9):
        source.read(row)
        assert len(source._loaded) <= 2


def test_an_array_is_mapped_and_sent_as_its_path(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((400, 64, 64, 3), np.uint8))
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((400, 64, 64, 3), np.uint8))
    for name in ("a.npy", "a.npz"):
        source = open_images(tmp_path / name)
        assert source.read(399).image.shape == (3, 64, 64)
        assert len(pickle.dumps(source)) < 2000


def test_what_is_unpacked_goes_with_its_source(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=PIXELS)
    # A short path: the sockets of worker processes are there too, and theirs have a limit.
    temporary = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    loader = ImageLoader(open_images(tmp_path / "a.npz"), workers=2, batch_size=2)
    for _ in range(2):  # the processes of the first round are gone, the file is not
        assert sum(len(b.images) for b in loader) == 9
    assert os.listdir(temporary)
    del loader
    gc.collect()
    assert not [name for name in os.listdir(temporary) if not name.startswith("pymp-")]
    shutil.rmtree(temporary)


# -- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_timm_models_are_shown_pictures_as_timm_shows_them(name):
    model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    drawn = picture(7, (300, 260))
    pixels = evaluation_transform(model)(drawn)
    assert pixels.dtype == torch.uint8
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    torch.testing.assert_close((pixels / 255 - mean) / std, theirs(drawn))


def test_torchvision_weights_bring_their_transform():
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    drawn = picture(7, (300, 260))
    for given in (weights, weights.transforms()):
        pixels = evaluation_transform(given)(drawn)
        preset = weights.transforms()
        mean, std = (torch.tensor(getattr(preset, k))[:, None, None] for k in ("mean", "std"))
        torch.testing.assert_close((pixels / 255 - mean) / std, preset(drawn))
    assert evaluation_transform(weights, 112)(drawn).shape == (3, 112, 112)


def test_other_models_take_pictures_as_they_are_or_in_a_size():
    assert evaluation_transform(torch.nn.Linear(1, 1)) is None
    assert evaluation_transform(torch.nn.Linear(1, 1), 32)(PICTURES[0]).shape == (3, 32, 32)
    assert evaluation_transform(timm.create_model("resnet10t"), 64)(PICTURES[0]).shape == (
        3,
        64,
        64,
    )
    for bad in (0, True, 2.5):
        with pytest.raises(InputError, match="the size of images"):
            evaluation_transform(None, bad)


def _raw_npy(shape, kind="|u1", content=b""):
    buffer = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


def _raw_npz(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


HUGE = 1 << 50
_FINE = _raw_npy((2, 8, 8, 3), content=bytes(384))
HOSTILE = {
    "huge npy": ("a.npy", _raw_npy((HUGE, 8, 8, 3)), "cut short"),
    "npy of objects": ("a.npy", _raw_npy((2,), "|O", b"cos\nsystem\n"), "Python objects"),
    "npy with an endless header": (
        "a.npy",
        b"\x93NUMPY\x02\x00" + b"\xff" * 4,
        "header has 4,294,967,295 bytes",
    ),
    "huge images": ("a.npz", {"images": _raw_npy((HUGE, 8, 8, 3))}, "size that its header"),
    "images of objects": ("a.npz", {"images": _raw_npy((2, 8, 8, 3), "|O", b"x")}, "objects"),
    "huge labels": ("a.npz", {"images": _FINE, "labels": _raw_npy((HUGE,), "<i8")}, "as many"),
    "wide labels": ("a.npz", {"images": _FINE, "labels": _raw_npy((2,), "|V999999999")}, "as many"),
    "cut labels": ("a.npz", {"images": _FINE, "labels": _raw_npy((2,), "<i8")}, "size that its"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_headers_are_read_before_memory_is_taken(attack, tmp_path):
    name, content, words = HOSTILE[attack]
    file = tmp_path / name
    if isinstance(content, dict):
        _raw_npz(file, **content)
    else:
        file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=words) as caught:
            open_images(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_array_that_does_not_fit_on_the_disk(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((400, 64, 64, 3), np.uint8))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1 << 20))
    with pytest.raises(DataError, match=r"a\.npz\[images\]: 4,915,328 bytes have to be extracted"):
        open_images(tmp_path / "a.npz")
