"""HDR frames (PQ and HLG, as phones record them) to the brightness and colours of BT.709.

Light is a share of white, which is 203 cd/m2 (BT.2408). Up to 0.3 it stays what it is; from there to the peak of the clip, which becomes
the brightest value of a picture, it is compressed by the curve of ffmpeg's `tonemap=mobius`.
"""

import functools

import av
import numpy as np

from data_pipelines.streams import side_data

PQ, HLG = 16, 18  # ITU-T H.273, transfer characteristics
WHITE, PEAK, KNEE = 203.0, 1000.0, 0.3  # cd/m2, cd/m2 where the clip does not say, share of white below which nothing is compressed
DISPLAY_GAMMA = 2.4  # BT.1886
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
BT2020_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)  # BT.2087


def is_hdr(frame: av.VideoFrame) -> bool:
    return frame.color_trc in (PQ, HLG)


def peak(frame: av.VideoFrame) -> float:
    """The brightest light of a clip in cd/m2: its MaxCLL, else the peak of the display it was made on (CTA-861.3, SMPTE ST 2086).

    HLG is relative to the display, here one of 1000 cd/m2.
    """
    if frame.color_trc != PQ:
        return PEAK
    level, display = side_data(frame, "CONTENT_LIGHT_LEVEL"), side_data(frame, "MASTERING_DISPLAY_METADATA")
    stated = float(np.frombuffer(level, "<u4")[0]) if level else 0.0
    if display and not stated:
        # AVMasteringDisplayMetadata: 9 rationals, the highest luminance, then whether colours and luminance are there
        *_, numerator, denominator, _, has_luminance = np.frombuffer(display, "<i4")[:22].tolist()
        stated = numerator / denominator if has_luminance and denominator else 0.0
    return min(max(stated, 1.01 * WHITE), 10_000.0) if stated else PEAK


def to_bt709(signal: np.ndarray, transfer: int, peak: float = PEAK) -> np.ndarray:
    """RGB of BT.2020, uint16 "H W 3" as the file codes it, to RGB of BT.709, uint8; light of `peak` cd/m2 becomes 255."""
    light = _linear(transfer)[signal]
    if transfer == HLG:  # the light of the scene to that of a display (BT.2100)
        light *= np.maximum(light @ BT2020_LUMA, 1e-6)[..., None] ** 0.2 * (PEAK / WHITE)
    light = np.maximum(light @ BT2020_TO_BT709.T, 0.0)
    brightest = np.maximum(light.max(-1, keepdims=True), 1e-6)
    light *= _compressed(brightest, peak / WHITE) / brightest
    return np.rint(255 * np.minimum(light, 1.0) ** (1 / DISPLAY_GAMMA)).astype(np.uint8)


@functools.cache
def _linear(transfer: int) -> np.ndarray:
    """Of each uint16 signal: for PQ the light as a multiple of white, for HLG that of the scene, 0 to 1 (BT.2100)."""
    signal = np.arange(65536) / 65535
    if transfer == HLG:
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:
        root = signal ** (32 / 2523)
        light = (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305) * (10_000 / WHITE)
    return light.astype(np.float32)


def _compressed(light: np.ndarray, peak: float) -> np.ndarray:
    """The light that a display of 1 shows for 0 to `peak` (ffmpeg, vf_tonemap.c)."""
    a = -(KNEE**2) * (peak - 1) / (KNEE**2 - 2 * KNEE + peak)
    b = (KNEE**2 - 2 * KNEE * peak + peak) / (peak - 1)
    bent = (b**2 + 2 * b * KNEE + KNEE**2) / (b - a) * (light + a) / (light + b)
    return np.where(light > KNEE, bent, light)
