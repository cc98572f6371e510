"""What a preparation says while it works."""

import io

from hola_megatron.data.prepare.progress import Counts, ProgressReport


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_30_seconds_where_stderr_is_no_terminal():
    clock, stream = Clock(), io.StringIO()
    progress = ProgressReport(1_000_000, stream, clock)
    progress.update(Counts())
    clock.now += 29
    progress.update(Counts(100_000, 200_000, 50_000))
    assert stream.getvalue() == ""
    clock.now += 11
    progress.update(Counts(400_000, 800_000, 1_234_567))
    progress.update(Counts(410_000, 820_000, 1_300_000))
    assert stream.getvalue() == "prepare | 40.0% | 1,234,567 tokens | 0.0 MB/s | eta 1m00s\n"
    clock.now += 30
    progress.update(Counts(500_000, 140_000_000, 2_000_000))
    assert stream.getvalue().splitlines()[1] == "prepare | 50.0% | 2,000,000 tokens | 2.0 MB/s | eta 1m10s"


def test_what_earlier_runs_have_done_does_not_count_for_the_speed():
    clock, stream = Clock(), io.StringIO()
    progress = ProgressReport(1_000_000, stream, clock)
    progress.update(Counts(900_000, 900_000_000, 9))
    clock.now += 3600
    progress.update(Counts(950_000, 900_000_000 + 3_600_000_000, 10))
    assert stream.getvalue() == "prepare | 95.0% | 10 tokens | 1.0 MB/s | eta 1h00m\n"


def test_a_bar_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = ProgressReport(1_000_000, stream, Clock())
    progress.update(Counts(500_000, 0, 7))
    progress.close()
    assert "50%" in stream.getvalue() and "7 tokens" in stream.getvalue() and "prepare |" not in stream.getvalue()
