"""Files that look like pictures and would hurt whoever opens them."""
import io
import struct
import zlib


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def bomb(path):
    """A small PNG of 20,000 x 20,000 px."""
    rows = zlib.compress(bytes(20_000 * 2_501))
    header = struct.pack('>IIBBBBB', 20_000, 20_000, 1, 0, 0, 0, 0)
    parts = (b'IHDR', header), (b'IDAT', rows), (b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*p) for p in parts))


def large_jpeg(path, image):
    """A JPEG that says it has 13,000 x 13,000 px."""
    image.save(data := io.BytesIO(), 'JPEG')
    data = bytearray(data.getvalue())
    at = data.index(b'\xff\xc0') + 5
    data[at:at + 4] = struct.pack('>HH', 13_000, 13_000)
    path.write_bytes(data)
