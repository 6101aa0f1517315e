from gear_loadtest.event_decoder import EventDecoder

STREAM = b': keep-alive\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b": "data: 2"}\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b'{"b": "data: 2"}', b"[DONE]"]


def test_events_are_the_same_wherever_the_bytes_are_cut():
    for cut in range(len(STREAM) + 1):
        decoder = EventDecoder()
        assert decoder.decode(STREAM[:cut]) + decoder.decode(STREAM[cut:]) + decoder.flush() == EVENTS


def test_events_come_as_soon_as_their_line_ends():
    decoder = EventDecoder()
    assert decoder.decode(b"data: one\nda") == [b"one"]
    assert decoder.decode(b"ta: two") == []
    assert decoder.flush() == [b"two"]
    assert decoder.flush() == []
