"""fp8 e4m3 with a scale per group of columns, as DeepSeek's models have it: what all who quantise share."""

E4M3_MAX = 448.0  # the greatest e4m3 number
GROUP = 128  # columns that share a scale
GROUPS_PER_WORD = 4  # packed scales: exponents to an int32
