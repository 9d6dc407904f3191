"""When each frame of a clip is on the screen: exact times, from those that a container rounded to its ticks.

MP4 holds the times of 16 frames a second exactly; Matroska and FLV round them to thousandths of a second, GIF to hundredths. The times
here are the same in all of them, so a clip that is put into another container gives the same frames.
"""

from fractions import Fraction

import av
from av.container import InputContainer

from configs.errors import RequestError

ROUNDING_TICK = Fraction(1, 500)  # seconds; a longer tick counts frames, as in AVI, and rounds nothing; GIF's is an exception
GIF_TICK = Fraction(1, 100)
GIF_RATE = Fraction(60)  # ffmpeg guesses 100 for it
EARLIER = Fraction(1, 1_000_000)  # seconds; times closer than that are the same


class FrameTimes:
    """The times of a stream's frames, in seconds from the first frame on; `of` is to be called for every frame, in the decoder's order.

    As long as every time is that of a constant rate, up to the rounding, the rate's own time is given. Else a frame's time is the earliest
    that is rounded to what the container says.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream, path: object) -> None:
        self._path = path
        self._tick = stream.time_base or EARLIER
        # AVI has no display times. Those that libavformat makes up are wrong with B frames; decoding times, in display order, are right.
        self._is_avi = container.format.name == "avi"
        self._rate, self._average_rate = stream.guessed_rate, stream.average_rate
        self._zero = None if container.start_time is None else Fraction(container.start_time, av.time_base)
        rounds = self._tick <= ROUNDING_TICK or self._tick == GIF_TICK
        # By how much a rounded time may be later than the true one.
        self.slack = self._tick / 2 if rounds else Fraction(0)
        rates = (self._rate, GIF_RATE) if rounds else ()
        self._grids = {rate: (0, Fraction(0), Fraction(0)) for rate in rates if rate and rate * self._tick < 1}
        self._first: Fraction | None = None
        self._last = Fraction(0)  # of the container
        self._time, self._duration = Fraction(-1), Fraction(0)

    def of(self, frame: av.VideoFrame) -> Fraction:
        """The frame's time."""
        now = self._container_time(frame)
        if self._first is None:
            self._first = self._last = now
            self._time = Fraction(0)
            return self._time
        if now < self._last:
            raise RequestError(f"{self._path}: its frames' times go back at {float(now):g} s; write it anew: ffmpeg -i CLIP NEW.mp4")
        self._last = now
        time = self._on_grid(now - self._first)
        self._duration, self._time = time - self._time, time
        return time

    @property
    def offset(self) -> Fraction:
        """Seconds from the container's zero to the first frame, which is later if sound begins before it."""
        offset = Fraction(0) if self._first is None or self._zero is None or self._is_avi else self._first - self._zero
        return offset if offset > 2 * EARLIER else Fraction(0)

    @property
    def until(self) -> Fraction:
        """When the frame last given leaves the screen, if no other follows."""
        if self._grids and self._duration:
            return self._time + self._duration
        return self._time + (1 / self._average_rate if self._average_rate else 0)

    def _container_time(self, frame: av.VideoFrame) -> Fraction:
        ticks = frame.dts if self._is_avi else frame.pts
        if ticks is not None:
            return ticks * self._tick
        if self._is_avi and self._first is not None and self._rate:  # the last frames of a decoder that reorders them
            return self._last + 1 / self._rate
        raise RequestError(f"{self._path}: its frames have no times, as in a raw stream; put it into an mp4 file")

    def _on_grid(self, time: Fraction) -> Fraction:
        """The time of the first rate that explains this and all earlier times: they are off by no more than a tick altogether."""
        for rate, (place, low, high) in list(self._grids.items()):
            now = round(time * rate)
            off = time - now / rate
            low, high = min(low, off), max(high, off)
            self._grids[rate] = (now, low, high)
            if now <= place or high - low > self._tick:
                del self._grids[rate]
        return next((place / rate for rate, (place, _, _) in self._grids.items()), time - self.slack)
