"""Whether what a champion scores still looks like what it was trained on, and how good it is where labels arrive.

traffic     scored rows in windows, from logged scores or from a file
reference   the champion's own rows, from the night that made it
drift       how far a window lies from them: an effect, and the chance of it without drift
run         windows judged, remembered, and the rule "k of the last n windows"
"""

from overnight.monitor.state import latest

__all__ = ["latest"]
