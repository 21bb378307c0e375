#define LEDOM_PATH attention_avx2
#define LEDOM_SPECIALISED 1
#include "reversed_attention/cpu/attention_body.h"
