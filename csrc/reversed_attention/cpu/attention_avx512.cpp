#define LEDOM_PATH attention_avx512
#define LEDOM_SPECIALISED 1
#include "reversed_attention/cpu/attention_body.h"
