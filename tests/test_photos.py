"""photos.py: whatever people's picture files hold."""
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageOps

from sources import photos
from sources.files import BadInput

RED, GREEN = (200, 30, 30), (30, 160, 60)


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image


def near(image: Image.Image, place: tuple[float, float], colour: tuple[int, int, int], within: int = 12) -> bool:
    x, y = (min(int(part * length), length - 1) for part, length in zip(place, image.size, strict=True))
    return max(abs(a - b) for a, b in zip(image.getpixel((x, y)), colour, strict=True)) <= within


@pytest.mark.parametrize(("name", "mode", "options"), [
    ("plain.jpg", "RGB", {"quality": 95}), ("plain.png", "RGB", {}), ("cmyk.jpg", "CMYK", {"quality": 95}),
    ("palette.png", "P", {}), ("palette.gif", "P", {}), ("lossless.webp", "RGB", {"lossless": True}),
    ("with spaces and é.png", "RGB", {}), ("alpha.png", "RGBA", {}), ("bitmap.bmp", "RGB", {}), ("t.tiff", "RGB", {}),
])
def test_every_usual_kind_reads_the_same(tmp_path, name, mode, options):
    halves().convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / name, **options)
    image = photos.read(tmp_path / name)
    assert image.mode == "RGB" and image.size == (40, 20)
    assert near(image, (0.2, 0.5), RED) and near(image, (0.8, 0.5), GREEN)
    again = photos.read(tmp_path / name, (tmp_path / name).read_bytes())
    assert np.array_equal(np.asarray(again), np.asarray(image))


def test_transparency_is_white(tmp_path):
    clear = halves().convert("RGBA")
    clear.paste((0, 0, 0, 0), (20, 0, 40, 20))
    clear.save(tmp_path / "alpha.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *GREEN])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    assert near(photos.read(tmp_path / "alpha.png"), (0.8, 0.5), (255, 255, 255), 0)
    assert near(photos.read(tmp_path / "alpha.png"), (0.2, 0.5), RED, 0)
    for name in ("palette.png", "grey.png"):
        assert near(photos.read(tmp_path / name), (0.5, 0.5), (255, 255, 255), 0)


def test_grey_and_sixteen_bits(tmp_path):
    values = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / "grey.png")
    for name in ("deep.png", "deep.tiff", "grey.png"):
        assert np.asarray(photos.read(tmp_path / name))[0, :, 0] == pytest.approx([0, 128, 255], abs=1), name


@pytest.mark.parametrize("name", ["turned.jpg", "turned.tiff", "turned.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_does_it(tmp_path, name, orientation):
    image, exif = halves(), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as opened:
        assert np.array_equal(photos.read(tmp_path / name), ImageOps.exif_transpose(opened))


def test_a_picture_is_turned_upright_whatever_else_its_exif_data_hold(tmp_path):
    text = b"72dpi\0"  # XResolution should be a fraction
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x011A, 2, len(text), struct.pack("<I", 38))]
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    block += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + b"\0" * 4 + text
    turned = halves().transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "side.jpg", exif=b"Exif\0\0" + block, quality=95)
    image = photos.read(tmp_path / "side.jpg")
    assert image.size == (40, 20) and near(image, (0.2, 0.5), RED) and near(image, (0.8, 0.5), GREEN)
    halves().save(tmp_path / "broken.png", exif=b"Exif\0\0no TIFF header")
    assert photos.read(tmp_path / "broken.png").size == halves().size


def test_a_large_jpeg_is_halved_before_its_pixels_are_counted(tmp_path, monkeypatch):
    halves((400, 200)).save(tmp_path / "large.jpg")
    monkeypatch.setattr(photos, "ENOUGH", 100)
    monkeypatch.setattr(photos, "MOST_PIXELS", 40_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # Pillow raises an error beyond twice that
    large = photos.read(tmp_path / "large.jpg")
    assert large.size == (200, 100) and near(large, (0.2, 0.5), RED) and near(large, (0.8, 0.5), GREEN)
    monkeypatch.setattr(photos, "MOST_PIXELS", 10_000)
    with pytest.raises(BadInput, match="20,000 pixels, the limit is 10,000"):
        photos.read(tmp_path / "large.jpg")


def test_a_file_that_is_no_picture_is_named(tmp_path, monkeypatch):
    halves().save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    halves((400, 400)).save(tmp_path / "good.png")
    for name, content in (("cut.jpg", whole[: len(whole) * 2 // 3]), ("text.jpg", b"hello"), ("empty.png", b""),
                          ("cut.png", (tmp_path / "good.png").read_bytes()[:150])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=name) as error:
            photos.read(tmp_path / name)
        assert "\n" not in str(error.value)
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(BadInput, match="float.tiff.*range"):
        photos.read(tmp_path / "float.tiff")
    with pytest.raises(BadInput, match="nowhere"):
        photos.read(tmp_path / "nowhere.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(BadInput, match="good.png"):
        photos.read(tmp_path / "good.png")


def test_pictures_are_found_in_the_usual_folders_and_by_either_spelling(tmp_path):
    accented = "caf\u00e9 1.png"
    for place in ("a.png", "images/b.png", "images/cats/d.png", "deep/er/c.png",
                  f"images/{unicodedata.normalize('NFD', accented)}"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        halves((2, 2)).save(tmp_path / place)
    wanted = [("", "a.png"), ("", "b.png"), ("deep/er", "c.png"), ("", "deep/er/c.png"), ("", "none.png"), None,
              ("", accented), ("gone", "b.png"), ("cats", "d.png"), ("", "long" * 100)]
    found = photos.find(tmp_path, wanted)
    assert [None if path is None else unicodedata.normalize("NFC", path.relative_to(tmp_path).as_posix())
            for path in found] == ["a.png", "images/b.png", "deep/er/c.png", "deep/er/c.png", None, None,
                                   f"images/{accented}", "images/b.png", "images/cats/d.png", None]


def test_a_folder_is_listed_with_the_folders_in_it(tmp_path):
    for place in ("b.JPG", "a/z.png", "notes.txt", ".hidden.png", ".thumbnails/b.png",
                  "paper.PDF", "film.mpg", "data.h5", "figure.eps"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"")
    (tmp_path / "a" / "round").symlink_to(tmp_path)  # would never end
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    halves((2, 2)).save(elsewhere / "e.png")
    (tmp_path / "linked").symlink_to(elsewhere)
    found = [path.relative_to(tmp_path).as_posix() for path in photos.listed(tmp_path)]
    assert found == ["a/z.png", "b.JPG", "linked/e.png"]
    with pytest.raises(BadInput, match="no such folder"):
        photos.listed(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no pictures"):
        photos.listed(tmp_path / "empty")
