#define LEDOM_PATH attention_avx512
#include "reversed_attention/cpu/attention_body.h"
