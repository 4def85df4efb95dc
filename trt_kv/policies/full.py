"""The whole cache: the yardstick every other policy is measured against."""

from trt_kv.policy import Policy

POLICY = Policy(name="full", summary="keep every token of every layer")
