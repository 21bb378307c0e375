#define LEDOM_PATH attention_portable
#define LEDOM_SPECIALISED 0
#include "reversed_attention/cpu/attention_body.h"
