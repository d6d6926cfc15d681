{
  # Every .cc file of the core and of bind/, found here and in CMakeLists.txt by the same rule: each folder's own
  # files, none below.
  'targets': [
    {
      'target_name': 'memferry',
      'sources': [
        '<!@(ls native/os/*.cc native/page/*.cc native/track/*.cc native/wire/*.cc native/fault/*.cc native/stage/*.cc native/share/*.cc native/restore/*.cc native/transfer/*.cc native/spread/*.cc native/bind/*.cc)',
      ],
      'include_dirs': ['native'],
      'defines': ['NAPI_VERSION=8', 'NAPI_CPP_EXCEPTIONS'],
      # As system headers, so that our warnings are about our code.
      # The header that scripts/install.mjs precompiles into build/, where the compilers run; without that it is one more.
      'cflags_cc': [
        '-include', 'standard_headers.h',
        '-std=c++20', '-fexceptions', '-frtti', '-fvisibility=hidden', '-fvisibility-inlines-hidden',
        '-Wall', '-Wextra', '-Wshadow', '-Wconversion',
        '-isystem', '<!(node -p "require(\'path\').resolve(require(\'node-addon-api\').include_dir)")',
      ],
      'cflags_cc!': ['-fno-exceptions', '-fno-rtti', '-std=gnu++17', '-std=gnu++20', '-Wno-unused-parameter'],
      'configurations': {
        'Release': { 'cflags': ['-O3'], 'cflags!': ['-O2'] },
        'Debug': { 'cflags': ['-O0', '-g'] },
      },
      'libraries': ['-pthread', '-llz4', '-lzstd'],
    },
    {
      # What QEMU is started with (LD_PRELOAD): no Node, and of C++ nothing but the language.
      'target_name': 'memferry_shim',
      'product_name': 'libmemferry-shim',
      # Here, since node-gyp's own condition of the same kind says 'node'.
      'target_conditions': [['_type=="loadable_module"', { 'product_extension': 'so' }]],
      'sources': ['native/shim/shim.cc'],
      'include_dirs': ['native'],
      'cflags_cc': [
        '-std=c++20', '-fno-exceptions', '-fno-rtti', '-fvisibility=hidden', '-Wall', '-Wextra', '-Wshadow', '-Wconversion',
      ],
      'cflags_cc!': ['-std=gnu++17', '-std=gnu++20', '-Wno-unused-parameter'],
      'ldflags': ['-Wl,--as-needed', '-Wl,-z,defs'],
      'libraries': ['-pthread'],
    },
  ],
}
