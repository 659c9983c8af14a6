"""What onnxruntime-genai computes with the small folder of `tests/it/genai.rs`, in fp32.

    LIGHTCONE_GENAI_FOLDER=/tmp/small cargo test --test it onnxruntime_genai_computes
    python genai_logits.py /tmp/small >genai_logits.json

onnxruntime-genai 0.18.0, onnxruntime 1.32.0.
"""

import json
import sys

import numpy
import onnxruntime_genai

tokens = [i * 37 % 260 for i in range(96)]
model = onnxruntime_genai.Model(sys.argv[1])
parameters = onnxruntime_genai.GeneratorParams(model)
parameters.set_search_options(max_length=len(tokens) + 1, batch_size=1)
generator = onnxruntime_genai.Generator(model, parameters)
generator.append_tokens(numpy.array([tokens], dtype=numpy.int32))
logits = numpy.array(generator.get_output("logits")).reshape(len(tokens), -1)
rows = {str(at): [round(float(x), 6) for x in logits[at]] for at in (0, 1, 17, 95)}
print(json.dumps({"tokens": tokens, "logits": rows}, separators=(",", ":")))
