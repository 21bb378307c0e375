#define LEDOM_PATH(name) name##_avx512
#include "layers/cpu/layers_body.h"
