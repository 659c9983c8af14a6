"""What the client tests talk to; set by run.py."""

import os

URL = os.environ["SDK_TEST_URL"]
KEY = os.environ["SDK_TEST_KEY"]
ADMIN_KEY = os.environ["SDK_TEST_ADMIN_KEY"]
MODEL = "tzafon.sm-1"
MODELS = ("tzafon.sm-1", "tzafon.northstar-cua-fast")

# Both spellings of the base URL are in the wild.
BASE_URLS = (URL, URL + "/v1")

HELLO = [{"role": "user", "content": "Say hello to the lighthouse keeper."}]
# Greedy and short: the same text every time, in well under a second a request.
SHORT = {"messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
