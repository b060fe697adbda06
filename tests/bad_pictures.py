"""Pictures that go wrong, and pictures that must come out upright, in RGB and on white."""
import io
import struct
import zlib

import numpy as np
from PIL import Image

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
TRUTH = (10, 20, 30, 50)    # px, of the red part of a picture of 80 x 60


def scene():
    image = Image.new("RGB", (80, 60), WHITE)
    image.paste(RED, TRUTH)
    return image


def red_box(image):
    """Where a picture is red, px."""
    r, g, b = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    ys, xs = ((r > 128) & (g < 128) & (b < 128)).nonzero()
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path):
    """A small PNG of 20,000 x 20,000 px."""
    rows = zlib.compress(bytes(20_000 * 2_501))
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts))


def large_jpeg(path, image):
    """A JPEG that says it has 13,000 x 13,000 px."""
    image.save(data := io.BytesIO(), "JPEG")
    data = bytearray(data.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at:at + 4] = struct.pack(">HH", 13_000, 13_000)
    path.write_bytes(data)


def cut_jpeg(path):
    noise = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data := io.BytesIO(), "JPEG")
    path.write_bytes(data.getvalue()[:len(data.getvalue()) // 2])


def turned(path, tag):
    """The scene stored so that EXIF's note `tag` puts it upright."""
    exif = Image.Exif()
    exif[274] = tag
    stored = scene().transpose({5: 5, 6: 2, 7: 6}[tag])
    stored.save(path, exif=exif, quality=100, subsampling=0)


def clear():
    """The scene on a ground that is transparent, and blue where one does not look."""
    image = Image.new("RGBA", (80, 60), (*BLUE, 0))
    image.paste((*RED, 255), TRUTH)
    return image


def palette():
    image = Image.new("P", (80, 60), 0)
    image.putpalette([*BLUE, *RED])
    image.paste(1, TRUTH)
    return image


def make_all(folder):
    """Every picture of the table in `test_bad_inputs`, by a name that says what it is."""
    image, grey = scene(), scene().convert("L")
    bomb(folder / "bomb.png")
    large_jpeg(folder / "large.jpg", image)
    cut_jpeg(folder / "cut.jpg")
    for w, h in ((1, 201), (1, 1), (15, 640)):
        Image.new("RGB", (w, h), WHITE).save(folder / f"{w}x{h}.png")
    (folder / "zero.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    for tag in (5, 6, 7): turned(folder / f"exif{tag}.jpg", tag)
    image.save(folder / "plain.png")
    clear().save(folder / "rgba.png")
    palette().save(folder / "palette.png", transparency=0)
    clear().convert("LA").save(folder / "la.png")
    grey.save(folder / "l.png")
    image.convert("1", dither=0).save(folder / "1.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(folder / "grey16.png")
    Image.fromarray(np.ones((60, 80), np.float32)).save(folder / "float.tiff")
    more = dict(save_all=True, append_images=[Image.new("RGB", (80, 60), BLUE)])
    image.save(folder / "film.gif", **more)
    image.save(folder / "film.webp", lossless=True, **more)
