#define LEDOM_PATH attention_portable
#include "reversed_attention/cpu/attention_body.h"
