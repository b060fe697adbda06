"""Pictures that go wrong, in more formats than `test_bad_inputs` has: opened upright or refused by name."""
import io
import numpy as np
import pytest
from PIL import Image
import bad_pictures
from bad_pictures import BLUE, TRUTH, red_box
from ivt_min.boxes import iou, to_permille
from ivt_min.render import ImageError, draw_box, open_image


@pytest.fixture
def scene(): return bad_pictures.scene()


def refused(path, reason=None):
    with pytest.raises(ImageError, match=reason) as e: open_image(path)
    assert str(path) in str(e.value)


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


def test_input_is_left_alone(scene):
    before = np.array(scene)
    draw_box(scene, (0, 0, 1000, 1000)), open_image(scene).paste(BLUE, (0, 0, 80, 60))
    assert np.array_equal(scene, before)
