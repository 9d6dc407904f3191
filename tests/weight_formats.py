"""float8 and GGUF by their definitions, written apart from the code under test: files of them, and the numbers that they stand for."""

import json
import math
import struct

import numpy as np

GGUF_TYPES = {"F32": 0, "F16": 1, "Q8_0": 8, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30}  # enum ggml_type


def write_safetensors(path, tensors):
    """Writes {name: (code, shape, bytes)}; the library writes no float8 of numpy's."""
    header, end = {}, 0
    for name, (code, shape, data) in tensors.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return path


def write_gguf(path, tensors, architecture="wan", fields=()):
    """Writes {name: (type, shape, bytes)} by the format's definition: sizes in reverse, data at multiples of 32; `fields` are arrays."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text(architecture)] if architecture else []
    pairs += [text(key) + struct.pack(f"<IIQ{len(v)}i", 9, 5, len(v), *v) for key, v in dict(fields).items()]
    infos, data = b"", b""
    for name, (kind, shape, values) in tensors.items():
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]) + struct.pack("<IQ", GGUF_TYPES[kind], len(data))
        data += values + b"\0" * (-len(values) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def half(data):
    return float(np.frombuffer(bytes(data), "<f2")[0])


def float8(byte, exponent_bits):
    """The number of a byte of e4m3fn or e5m2 (OCP 8-bit floating point specification)."""
    mantissa_bits = 7 - exponent_bits
    bias, sign = 2 ** (exponent_bits - 1) - 1, -1.0 if byte & 128 else 1.0
    exponent, mantissa = (byte & 127) >> mantissa_bits, (byte & (2**mantissa_bits - 1)) / 2**mantissa_bits
    if exponent == 2**exponent_bits - 1 and (exponent_bits == 5 or mantissa == 7 / 8):
        return math.inf * sign if exponent_bits == 5 and not mantissa else math.nan
    return sign * (mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))


def q8_0(block):
    """A block of 32: a scale, then 32 signed bytes."""
    return [half(block[:2]) * (b - 256 if b > 127 else b) for b in block[2:]]


def k_scales(packed):
    """The eight scales and eight minima of 6 bits in the 12 bytes of Q4_K and Q5_K (get_scale_min_k4 in ggml-quants.c)."""
    low = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    high = [((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, (packed[j + 4] >> 4) | (packed[j] >> 6) << 4) for j in range(4, 8)]
    return low + high


def q4_k(block):
    """A block of 256: scale, scale of the minima, 12 bytes of scales, 128 of 4 bits, the low halves of 32 bytes before the high ones."""
    scale, least, packed, nibbles = half(block[:2]), half(block[2:4]), k_scales(block[4:16]), block[16:]
    quants = [[(nibbles[32 * (j // 2) + i] >> 4 * (j % 2)) & 15 for i in range(32)] for j in range(8)]
    return [scale * s * q - least * m for (s, m), part in zip(packed, quants, strict=True) for q in part]


def q5_k(block):
    """As Q4_K, with a fifth bit of each number in 32 bytes between: bit j of byte i belongs to number i of part j."""
    scale, least, packed, fifth, nibbles = half(block[:2]), half(block[2:4]), k_scales(block[4:16]), block[16:48], block[48:]
    quants = [[(nibbles[32 * (j // 2) + i] >> 4 * (j % 2)) & 15 | (fifth[i] >> j & 1) << 4 for i in range(32)] for j in range(8)]
    return [scale * s * q - least * m for (s, m), part in zip(packed, quants, strict=True) for q in part]


def q6_k(block):
    """A block of 256: 128 bytes of low 4 bits, 64 of high 2 bits, 16 signed scales, the scale of the scales (dequantize_row_q6_K)."""
    low, high, scales, whole = block[:128], block[128:192], block[192:208], half(block[208:])
    found = []
    for k in range(256):
        side, within = divmod(k, 128)
        quarter, i = divmod(within, 32)
        bits = (low[64 * side + 32 * (quarter % 2) + i] >> 4 * (quarter // 2)) & 15
        bits |= ((high[32 * side + i] >> 2 * quarter) & 3) << 4
        scale = scales[k // 16]
        found.append(whole * (scale - 256 if scale > 127 else scale) * (bits - 32))
    return found


FORMULAS = {"Q8_0": (q8_0, 34, (0,)), "Q4_K": (q4_k, 144, (0, 2)), "Q5_K": (q5_k, 176, (0, 2)), "Q6_K": (q6_k, 210, (208,))}


def random_blocks(kind, count, seed=0):
    """Random bytes, with scales that make numbers of about 0.1."""
    rng, (_, size, halves) = np.random.default_rng(seed), FORMULAS[kind]
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = rng.uniform(1e-4, 3e-4, (count, 1)).astype("<f2").view(np.uint8)
    return blocks
