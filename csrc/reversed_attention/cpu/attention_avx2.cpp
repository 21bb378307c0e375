#define LEDOM_PATH attention_avx2
#include "reversed_attention/cpu/attention_body.h"
