"""How good a clip is: frames in and out, measures against a reference clip, pictures of both.

A clip is a sequence of F frames; a frame is uint8 RGB of shape ``(H, W, 3)``, values 0..255.
``frames`` reads and writes clips by the processes of ``decoder`` and ``encoder``; ``metrics`` and
``sheet`` consume them, and import nothing but ``frames`` (``metrics`` also ``ssim``). A measure
streams over frame pairs, never resizes and never drops a frame: clips that don't match raise
ValueError.
"""
