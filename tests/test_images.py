"""Pictures that go wrong: each is made here, and is either opened upright in RGB or refused by name."""
import io, time
import numpy as np
import pytest
from PIL import Image
from bad_pictures import bomb, large_jpeg
from ivt_min.boxes import iou, to_permille
from ivt_min.render import ImageError, draw_box, open_image

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
TRUTH = (10, 20, 30, 50)   # px, of a picture of 80 x 60


@pytest.fixture
def scene():
    image = Image.new('RGB', (80, 60), WHITE)
    image.paste(RED, TRUTH)
    return image


def red_box(image):
    r, g, b = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    ys, xs = ((r > 128) & (g < 128) & (b < 128)).nonzero()
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def refused(path, reason=None):
    with pytest.raises(ImageError, match=reason) as e: open_image(path)
    assert str(path) in str(e.value)


def test_bomb(tmp_path):
    bomb(tmp_path/'bomb.png')
    start = time.process_time()
    refused(tmp_path/'bomb.png')
    assert time.process_time() - start < .2


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_large_jpeg(tmp_path, scene):
    large_jpeg(tmp_path/'large.jpg', scene)
    refused(tmp_path/'large.jpg', '13000 x 13000 pixels')


def test_strip(tmp_path):
    Image.new('RGB', (1, 201)).save(tmp_path/'strip.png')
    refused(tmp_path/'strip.png', 'aspect ratio of 1 x 201')
    Image.new('RGB', (1, 200)).save(tmp_path/'edge.png')
    assert open_image(tmp_path/'edge.png').size == (1, 200)


@pytest.mark.parametrize('size', [(1, 1), (15, 640)])
def test_small(tmp_path, size):
    Image.new('RGB', size, WHITE).save(tmp_path/'small.png')
    seen = draw_box(tmp_path/'small.png', (0, 0, 1000, 1000))
    assert seen.size == size and red_box(seen) == (0, 0, *size)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP'])
def test_truncated(tmp_path, kind):
    noise = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data := io.BytesIO(), kind)
    (tmp_path/'whole').write_bytes(data.getvalue())
    assert open_image(tmp_path/'whole').size == (80, 60)
    (tmp_path/'cut').write_bytes(data.getvalue()[:len(data.getvalue()) // 2])
    refused(tmp_path/'cut')


def test_no_picture(tmp_path):
    (tmp_path/'zero.png').write_bytes(b'')
    (tmp_path/'page.jpg').write_text('<!DOCTYPE html><html><body>404</body></html>')
    (tmp_path/'code.eps').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    for name in ('zero.png', 'page.jpg', 'code.eps', 'missing.png'): refused(tmp_path/name)
    refused(tmp_path)


def test_url(): refused('https://example.org/a.png', 'URL')


@pytest.mark.parametrize('tag,turn', [(1, None), (2, 0), (3, 3), (4, 1), (5, 5), (6, 2), (7, 6), (8, 4)])
@pytest.mark.parametrize('kind', ['png', 'jpg', 'webp', 'tiff'])
def test_orientation(tmp_path, scene, tag, turn, kind):
    exif = Image.Exif()
    exif[274] = tag
    stored = scene if turn is None else scene.transpose(turn)
    lossless = {'quality': 100, 'subsampling': 0} if kind == 'jpg' else {'lossless': True} if kind == 'webp' else {}
    stored.save(tmp_path/f'a.{kind}', exif=exif, **lossless)
    image = open_image(tmp_path/f'a.{kind}')
    assert image.size == (80, 60)
    assert iou(to_permille(red_box(image), 80, 60), to_permille(TRUTH, 80, 60)) == 1
    assert np.array_equal(open_image(image), image)   # not turned twice


def test_transparent(tmp_path, scene):
    rgba = Image.new('RGBA', (80, 60), (*BLUE, 0))
    rgba.paste((*RED, 255), TRUTH)
    rgba.save(tmp_path/'rgba.png')
    assert np.array_equal(open_image(tmp_path/'rgba.png'), scene)
    assert np.array_equal(draw_box(rgba, (0, 0, 500, 500)), draw_box(scene, (0, 0, 500, 500)))


def test_palette(tmp_path, scene):
    image = Image.new('P', (80, 60), 0)
    image.putpalette([*BLUE, *RED])
    image.paste(1, TRUTH)
    image.save(tmp_path/'palette.png', transparency=0)
    assert np.array_equal(open_image(tmp_path/'palette.png'), scene)


def test_grey(tmp_path):
    la = Image.new('LA', (9, 9), (0, 0))
    la.putpixel((4, 4), (100, 255))
    for name, image, ground in (('la', la, 255), ('l', la.getchannel(0), 0), ('1', Image.new('1', (9, 9), 1), 255)):
        image.save(tmp_path/f'{name}.png')
        got = open_image(tmp_path/f'{name}.png')
        assert got.mode == 'RGB' and got.getpixel((0, 0)) == (ground,) * 3
    assert open_image(la).getpixel((4, 4)) == (100,) * 3


def test_cmyk(tmp_path, scene):
    scene.convert('CMYK').save(tmp_path/'cmyk.jpg', quality=100, subsampling=0)
    assert b'Adobe' in (tmp_path/'cmyk.jpg').read_bytes()
    assert Image.open(tmp_path/'cmyk.jpg').mode == 'CMYK'
    assert np.abs(np.asarray(open_image(tmp_path/'cmyk.jpg')).astype(int) - np.asarray(scene)).max() < 20


@pytest.mark.parametrize('name', ['grey.png', 'grey.tiff'])
def test_sixteen_bits(tmp_path, name):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path/name)
    got = np.asarray(open_image(tmp_path/name))
    assert np.array_equal(got[..., 0].ravel(), np.arange(256))
    assert np.array_equal(open_image(ramp), got)


def test_float(tmp_path):
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path/'float.tiff')
    refused(tmp_path/'float.tiff', 'mode F')
    for bad in (np.ones((9, 9)), np.zeros((0, 9, 3), np.uint8), np.zeros((9, 9, 3), bool), None, 7):
        with pytest.raises(ImageError): open_image(bad)


@pytest.mark.parametrize('name', ['a.gif', 'a.webp'])
def test_animated(tmp_path, scene, name):
    more = {'lossless': True} if name == 'a.webp' else {}
    scene.save(tmp_path/name, save_all=True, append_images=[Image.new('RGB', (80, 60), BLUE)], **more)
    assert Image.open(tmp_path/name).n_frames == 2
    assert np.array_equal(open_image(tmp_path/name), scene)


def test_input_is_left_alone(scene):
    before = np.array(scene)
    draw_box(scene, (0, 0, 1000, 1000)), open_image(scene).paste(BLUE, (0, 0, 80, 60))
    assert np.array_equal(scene, before)
