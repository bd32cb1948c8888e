"""What is written on the way: kept, let through, printed in the end, or forgotten."""

import io

from hf_slim.cli.hf_slim_command.held_stream import HeldStream


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_kept_is_printed_in_its_order_and_then_all_at_once():
    stream = io.StringIO()
    held = HeldStream(stream)
    print("one", file=held)
    held.write("\r 50%")
    assert stream.getvalue() == ""
    held.release()
    assert stream.getvalue() == "one\n\r 50%"
    print("two", file=held)
    held.release()
    assert stream.getvalue() == "one\n\r 50%two\n"


def test_what_is_dropped_is_gone_and_what_follows_is_not():
    stream = io.StringIO()
    held = HeldStream(stream)
    print("one", file=held)
    held.drop()
    print("two", file=held)
    assert stream.getvalue() == "two\n"


def test_a_bar_is_let_through_where_a_person_watches_and_its_line_is_ended():
    stream = _Terminal()
    held = HeldStream(stream)
    print("a warning", file=held)
    held.write("\r 50%")
    assert stream.getvalue() == "\r 50%"
    held.drop()
    assert stream.getvalue() == "\r 50%\n"
