"""Numbers that the backends share."""

import math

# Logits are kept in units of ln 2, as exp2 is faster than exp on CPUs and GPUs.
LN2 = math.log(2)
LOG2E = math.log2(math.e)
